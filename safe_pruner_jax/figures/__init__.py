"""Pictures in one theme."""
