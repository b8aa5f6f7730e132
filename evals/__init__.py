"""What is asked of a trained model: perplexity, tasks, text."""
