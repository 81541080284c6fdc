"""Process groups, meshes, wrapping, counted collectives, and what the device is good at. Knows no model or optimizer."""
