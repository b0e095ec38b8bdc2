"""The commands of `openpi`, one file each."""
