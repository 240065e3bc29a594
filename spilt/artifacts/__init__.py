"""What is stored: where it lies, how it is written whole, how it is known again, how it is read."""
