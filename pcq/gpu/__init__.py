"""What a GPU does in one launch for a whole network: the proximal maps, and the sums of refits."""
