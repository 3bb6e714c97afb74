"""Saliency maps of a policy: by gradient (eq. 2), by perturbation (eq. 3), their scores and their picture."""

# name -> what it is; `methods.raw_maps` computes them
METHODS = {
    "digr": "gradient of eq. 2, for which a DIGR student is trained",
    "vg": "vanilla gradient, eq. 2 too: the same map under its name for other policies",
    "gb": "Gaussian-blur perturbation, eq. 3",
    "sarfa": "SARFA on the same perturbation",
    "gbp": "guided backpropagation",
    "gradcam": "Grad-CAM on the last convolution",
    "ig": "integrated gradients from the black picture",
    "smoothgrad": "SmoothGrad on guided backpropagation",
}
