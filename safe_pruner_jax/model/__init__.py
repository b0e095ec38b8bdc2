"""π0 and π0.5 as pure functions over openpi's parameter tree."""
