"""Published recipes, one YAML file each; md2/config.py finds them by name."""
