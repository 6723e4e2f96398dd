"""The sub-networks. Parameter names are those of torchvision's ResNets and of official Monodepth2 checkpoints."""
