"""Memory that models need, and the budget that grants it: needs, plan, trace, budget."""
