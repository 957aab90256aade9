"""What prepare_data.py, generate.py and evaluate_alignment.py are made of, each file for one of them."""
