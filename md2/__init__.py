"""Monodepth2 at high throughput: the DALI pipeline, the networks, the losses, the training loop."""

__version__ = "0.1.0"
