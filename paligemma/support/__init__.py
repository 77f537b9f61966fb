"""Care that no lesson is about: files, configs, drawing, the command line, the course itself."""
