"""What is needed, what is granted, what gives way: needs, plan, trace, budget."""
