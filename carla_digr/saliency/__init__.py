"""Saliency maps of a policy: the methods, their scores and their picture."""

from carla_digr.saliency.methods import METHODS, Method

__all__ = ["METHODS", "Method"]
