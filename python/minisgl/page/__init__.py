"""The page that the server shows at `/`, as files (`assets/`), made of the sources in the repository's `page/`."""
