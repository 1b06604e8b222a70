"""Pictures and sound, from what a user gives to the arrays that a model takes."""
