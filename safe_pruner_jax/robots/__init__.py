"""The border to the robots: requests in, actions out, openpi's named configurations."""
