"""Saliency maps of a policy: the methods, their scores and their picture."""

from carla_digr.saliency.methods import DEFAULT, METHODS, Method

__all__ = ["DEFAULT", "METHODS", "Method"]
