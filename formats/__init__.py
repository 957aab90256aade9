"""How rows, chats, models, tensors and folders stand in files.

rows
    json_files           JSON, strictly: of rows, and of the records beside adapters and reward models
    row_files            rows of a JSONL, JSON, CSV, parquet file or of a dataset, each with its place
    row_shapes           the shapes of preference rows: which fields hold prompt, chosen and rejected
    row_prompts          all that a row asks: messages, and the columns around a prompt
    row_pictures         the pictures of a row, as paths or bytes, and their places in its texts
    picture_reader       what a model's processor makes of them: how many tokens they are, ids and pixels
    preference_rows      a row of a known shape -> (prompt, chosen, rejected)

text
    chat_text            strings and messages -> the text that a model reads -> token ids, and where a response ends

models and what is written
    hub_files            what a hub id stands for: a folder on this machine
    model_files          models and tokenizers of a folder or hub
    tensor_files         safetensors files, written so that others can read them
    png_files            PNG files without a library, of the toy world with pictures
    toy_files            the folder of a toy world, made once
    written_files        manifest.json: which files are ours, and whether they are whole
"""
