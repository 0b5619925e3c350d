"""What is measured, how, and the records."""
