"""Saliency maps of a policy: by gradient (eq. 2), by perturbation (eq. 3), their scores and their picture."""
