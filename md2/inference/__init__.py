"""Use a trained model: predict images and videos, export it."""
