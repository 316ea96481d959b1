"""What comes after training: answers, evaluation, and the summary of a run."""
