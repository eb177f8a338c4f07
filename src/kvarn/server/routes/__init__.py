"""The routes, one file for each kind; each has a function that adds its routes to the application."""
