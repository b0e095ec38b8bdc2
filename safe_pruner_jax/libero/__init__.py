"""LIBERO: simulator, environment, scripted expert, demonstrations."""
