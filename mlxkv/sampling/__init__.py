"""Which tokens may come, and which one does: parameters, sampler, grammars."""
