"""Bags of drives: read, recorded, repaired, played and explained anew. No ROS in here."""
