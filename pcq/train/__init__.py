"""Fine-tuning a network on its levels: batches, the loop, what is saved, what is measured."""
