"""Where rows come from: tasks, teacher, sampling, selection, data sets."""
