"""What a program costs, and what chips can do."""
