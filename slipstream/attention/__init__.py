"""How do tokens see what came before them? Protocol, backends and their choice. Import the file you need."""
