"""What the two ways of training share: what they draw from, how far they have come, where that is kept."""
