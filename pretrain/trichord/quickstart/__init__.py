"""`trichord quickstart`: the whole road on real data, with commands a user would type."""
