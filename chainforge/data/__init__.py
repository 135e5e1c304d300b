"""Where rows come from, and which are trained on: tasks, filters, selection, data sets."""
