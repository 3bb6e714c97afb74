"""ROS 2 nodes of carla_digr."""
