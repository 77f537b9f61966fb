# %% 1 · forgets bos and newline
answer = (269, 1, 11)

# %% 1 · forgets that both answers end with eos
answer = (271, 1, 9)

# %% 1 · counts pixels for image tokens
answer = (224 * 224 + 14, 1, 11)

# %% 1 · sixteen image tokens
answer = (30, 1, 11)

# %% 1 · pads prompts and answers each by themselves
answer = (256 + 1 + 9 + 1 + 7 + 1, 9, 11)

# %% 1 · labels the newline as well
answer = (271, 1, 13)

# %% 1 · no row needs padding
answer = (271, 0, 11)

# %% 1 · one number
answer = 271

# %% 1 · a tensor
answer = torch.tensor([271, 1, 11])


# %% 2 · counts tokens, not pictures
def read_row(input_ids, token_type_ids):
    prefix, answer = input_ids[token_type_ids == 0].tolist(), input_ids[token_type_ids == 1]
    prompt = prefix[prefix.index(tokenizer.bos_id) + 1 : -1]
    pictures = prefix.count(tokenizer.image_id)
    return pictures, tokenizer.decode(prompt), processor.decode(answer)


# %% 2 · ends the prompt at the first newline
def read_row(input_ids, token_type_ids):
    prefix, answer = input_ids[token_type_ids == 0].tolist(), input_ids[token_type_ids == 1]
    pictures = prefix.count(tokenizer.image_id) // processor.num_image_tokens
    prompt = prefix[prefix.index(tokenizer.bos_id) + 1 : prefix.index(tokenizer.newline_id)]
    return pictures, tokenizer.decode(prompt), processor.decode(answer)


# %% 2 · leaves the newline in the prompt
def read_row(input_ids, token_type_ids):
    prefix, answer = input_ids[token_type_ids == 0].tolist(), input_ids[token_type_ids == 1]
    pictures = prefix.count(tokenizer.image_id) // processor.num_image_tokens
    prompt = prefix[prefix.index(tokenizer.bos_id) + 1 :]
    return pictures, tokenizer.decode(prompt), processor.decode(answer)


# %% 2 · splits at the newline and ignores the types
def read_row(input_ids, token_type_ids):
    ids = input_ids.tolist()
    pictures = ids.count(tokenizer.image_id) // processor.num_image_tokens
    ids = ids[ids.index(tokenizer.bos_id) + 1 :]
    last = len(ids) - 1 - ids[::-1].index(tokenizer.newline_id)
    return pictures, tokenizer.decode(ids[:last]), processor.decode(ids[last + 1 :])


# %% 2 · always one picture
def read_row(input_ids, token_type_ids):
    prefix, answer = input_ids[token_type_ids == 0].tolist(), input_ids[token_type_ids == 1]
    prompt = prefix[prefix.index(tokenizer.bos_id) + 1 : -1]
    return 1, tokenizer.decode(prompt), processor.decode(answer)


# %% 2 · ids instead of text
def read_row(input_ids, token_type_ids):
    prefix, answer = input_ids[token_type_ids == 0].tolist(), input_ids[token_type_ids == 1]
    pictures = prefix.count(tokenizer.image_id) // processor.num_image_tokens
    return pictures, prefix[prefix.index(tokenizer.bos_id) + 1 : -1], answer.tolist()[:-1]


# %% 2 · a whole row for the prompt
def read_row(input_ids, token_type_ids):
    pictures = int((input_ids == tokenizer.image_id).sum()) // processor.num_image_tokens
    answer = processor.decode(input_ids[token_type_ids == 1])
    return pictures, processor.decode(input_ids), answer


# %% 2 · cuts an end off an answer that is not there
def read_row(input_ids, token_type_ids):
    prefix, answer = input_ids[token_type_ids == 0].tolist(), input_ids[token_type_ids == 1]
    pictures = prefix.count(tokenizer.image_id) // processor.num_image_tokens
    prompt = prefix[prefix.index(tokenizer.bos_id) + 1 : -1]
    answer = tokenizer.decode(answer[:-1].tolist()) or None
    return pictures, tokenizer.decode(prompt), answer


# %% 3 · trusts everybody
def sound(batch):
    return True


# %% 3 · trusts nobody
def sound(batch):
    return False


# %% 3 · does not look at the labels
def sound(batch):
    ids = batch["input_ids"]
    return bool(
        ((ids == tokenizer.image_id).sum(1) == processor.num_image_tokens).all()
        and ((ids == tokenizer.bos_id).sum(1) == 1).all()
        and (ids[:, -1] == tokenizer.eos_id).all()
    )


# %% 3 · looks at the labels only
def sound(batch):
    ids, labels, types = batch["input_ids"], batch["labels"], batch["token_type_ids"]
    return torch.equal(labels, ids.masked_fill(types == 0, -100))


# %% 3 · counts image tokens in the whole batch
def sound(batch):
    ids, labels, types = batch["input_ids"], batch["labels"], batch["token_type_ids"]
    return bool(
        (ids == tokenizer.image_id).sum() == 4 * processor.num_image_tokens
        and ((ids == tokenizer.bos_id).sum(1) == 1).all()
        and (labels[:, -1] == tokenizer.eos_id).all()
        and torch.equal(labels, ids.masked_fill(types == 0, -100))
    )


# %% 3 · forgets bos
def sound(batch):
    ids, labels, types = batch["input_ids"], batch["labels"], batch["token_type_ids"]
    return bool(
        ((ids == tokenizer.image_id).sum(1) == processor.num_image_tokens).all()
        and (labels[:, -1] == tokenizer.eos_id).all()
        and torch.equal(labels, ids.masked_fill(types == 0, -100))
    )


# %% 3 · forgets on which side the padding is
def sound(batch):
    ids, labels, types = batch["input_ids"], batch["labels"], batch["token_type_ids"]
    return bool(
        ((ids == tokenizer.image_id).sum(1) == processor.num_image_tokens).all()
        and ((ids == tokenizer.bos_id).sum(1) == 1).all()
        and torch.equal(labels, ids.masked_fill(types == 0, -100))
    )


# %% 3 · returns a tensor
def sound(batch):
    return (batch["labels"][:, -1] == tokenizer.eos_id).all()


# %% 1 · takes the longer prompt for the longer row
answer = (270, 1, 11)


# %% 2 · strips the text instead of taking off the one newline
def read_row(input_ids, token_type_ids):
    pictures = int((input_ids == tokenizer.image_id).sum()) // processor.num_image_tokens
    prompt = tokenizer.decode(input_ids[token_type_ids == 0].tolist()).strip()
    return pictures, prompt, processor.decode(input_ids[token_type_ids == 1])
