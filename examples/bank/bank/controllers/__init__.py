"""What each operation of the OpenAPI file does. They know neither Connexion nor Flask."""
