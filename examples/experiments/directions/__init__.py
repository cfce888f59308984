"""Which direction of the perturbation, and which h: equal searches on several tasks."""
