"""What the four tools beside the trainers are made of; a file's first word says whose it is.

of generate.py and evaluate_alignment.py
    prompts              the prompts of a file of rows -> token ids, as in training
    models               a base, adapters and reward models on it: checked, loaded, asked for scores

of evaluate_alignment.py
    evaluate_adapters    how adapters are named, where a run keeps them, the curves of their training
    evaluate_prompts     which rows are asked, and which of them are benign
    evaluate_responses   what a policy says, and what models say of that: log-probs, KL, scores
    evaluate_pairs       accuracy of the reward that a policy implies, on pairs
    evaluate_numbers     a row per response -> fields -> means with intervals
    evaluate_report      report.json, and the folder that it goes to
    evaluate_words       its sentences: what was measured, and how to read it
    evaluate_page        report.html
    evaluate_text        report.txt, for a terminal

of generate.py
    generate_prompts     which rows are asked, and what of them goes along
    generate_reward      a reward function of the user's own
    generate_rows        responses, or best against worst as a pair -> rows
    generate_output      the file that they go to, which a killed run goes on with
    generate_chat        --chat

of prepare_data.py
    prepare_files        which files are read and written
    prepare_rows         raw rows of every kind -> pairs and labelled responses
    prepare_pictures     pictures of raw rows -> files beside the prepared rows
    prepare_pairs        one of each pair, in splits by prompt
    prepare_account      what became of every row

of gpu_check.py
    gpu_models           the report; tiny models, pairs, updates
    gpu_numbers          the machine, kernels, numbers beside fp64, of pictures too, optimisers, waits
    gpu_load             memory beside the estimate, speed
    gpu_runs             whole scripts, resume, ranks
"""
