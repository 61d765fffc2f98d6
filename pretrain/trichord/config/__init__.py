"""The whole run as one typed object; readable without torch."""
