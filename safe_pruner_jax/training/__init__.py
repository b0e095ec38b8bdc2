"""Training a π0 or π0.5 policy by flow matching, from demonstrations to a checkpoint in openpi's layout."""
