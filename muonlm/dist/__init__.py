"""Process groups, meshes, wrapping, counted collectives, and what the device does best. Knows no model or optimizer."""
