"""What Trunkline is compared with, each as a program of its own."""
