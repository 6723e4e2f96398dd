"""Depth metrics and odometry: compare predictions with ground truth."""
