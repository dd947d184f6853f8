"""What single methods have beside their adapters: layers, generators and choices, a file each."""
