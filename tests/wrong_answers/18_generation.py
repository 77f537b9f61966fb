# %% 1 · one call more for eos
model_calls, vision_runs, decoder_tokens, cached_tokens = 21, 1, 4123, 4123

# %% 1 · the prefill gives no token
model_calls, vision_runs, decoder_tokens, cached_tokens = 19, 1, 4123, 4123

# %% 1 · the picture each time
model_calls, vision_runs, decoder_tokens, cached_tokens = 20, 20, 4123, 4123

# %% 1 · the last token is fed
model_calls, vision_runs, decoder_tokens, cached_tokens = 20, 1, 4124, 4124

# %% 1 · forgets the prompt
model_calls, vision_runs, decoder_tokens, cached_tokens = 20, 1, 4115, 4115

# %% 1 · everything again each time
model_calls, vision_runs, decoder_tokens, cached_tokens = 20, 1, 82080, 4123

# %% 1 · only the answer is cached
model_calls, vision_runs, decoder_tokens, cached_tokens = 20, 1, 4123, 19

# %% 1 · room instead of what is held
model_calls, vision_runs, decoder_tokens, cached_tokens = 20, 1, 4123, 4124

# %% 1 · only the picture passes
model_calls, vision_runs, decoder_tokens, cached_tokens = 20, 1, 4104, 4104

# %% 1 · three of four
model_calls, vision_runs, decoder_tokens, cached_tokens = 20, 1, 4123, None


# %% 2 · looks at the tower only
def works_once(answer):
    run = lambda: answer(model, ids, pixels, 16)
    return len(tokens_out_of(model.vision_tower, run)) == 1


# %% 2 · looks at the decoder only
def works_once(answer):
    run = lambda: answer(model, ids, pixels, 16)
    return sum(tokens_out_of(mlp, run)) == ids.shape[1] + slow.shape[1] - 1


# %% 2 · compares the answers
def works_once(answer):
    return torch.equal(answer(model, ids, pixels, 16), slow)


# %% 2 · counts calls of the decoder
def works_once(answer):
    run = lambda: answer(model, ids, pixels, 16)
    looks, calls = len(tokens_out_of(model.vision_tower, run)), len(tokens_out_of(mlp, run))
    return looks == 1 and calls == slow.shape[1]


# %% 2 · thinks that the last token is fed
def works_once(answer):
    run = lambda: answer(model, ids, pixels, 16)
    looks, tokens = len(tokens_out_of(model.vision_tower, run)), sum(tokens_out_of(mlp, run))
    return looks == 1 and tokens == ids.shape[1] + slow.shape[1]


# %% 2 · at most as many tokens as a full pass each time
def works_once(answer):
    run = lambda: answer(model, ids, pixels, 16)
    looks, tokens = len(tokens_out_of(model.vision_tower, run)), sum(tokens_out_of(mlp, run))
    return looks == 1 and tokens < 6 * ids.shape[1]


# %% 2 · returns the counts
def works_once(answer):
    run = lambda: answer(model, ids, pixels, 16)
    return tokens_out_of(model.vision_tower, run)


# %% 2 · everything is fine
def works_once(answer):
    return True


# %% 3 · knows of no limits
def answer_limited(model, input_ids, pixel_values, attention_mask, limits):
    return generate(model, input_ids, pixel_values, attention_mask)


# %% 3 · one limit for all
def answer_limited(model, input_ids, pixel_values, attention_mask, limits):
    return generate(model, input_ids, pixel_values, attention_mask, max_new_tokens=max(limits))


# %% 3 · the smallest limit for all
def answer_limited(model, input_ids, pixel_values, attention_mask, limits):
    return generate(model, input_ids, pixel_values, attention_mask, max_new_tokens=min(limits))


# %% 3 · cuts afterwards, and works on for rows that had ended
def answer_limited(model, input_ids, pixel_values, attention_mask, limits):
    said = generate(model, input_ids, pixel_values, attention_mask, max_new_tokens=max(limits))
    for row, limit in zip(said, limits):
        row[limit:] = 0
    return said


# %% 3 · a limit of one too many
def answer_limited(model, input_ids, pixel_values, attention_mask, limits):
    cache = model.make_cache(len(input_ids), input_ids.shape[1] + max(limits) + 1)
    done, said = torch.zeros(len(input_ids), dtype=torch.bool), []
    while not done.all():
        logits = model(
            input_ids, pixel_values, attention_mask, cache=cache, logits_to_keep=1
        ).logits
        token = logits[:, -1].argmax(-1).masked_fill(done, 0)
        said.append(token)
        done = done | (token == EOS) | (torch.tensor(limits) < len(said))
        input_ids, pixel_values = token[:, None], None
        attention_mask = F.pad(attention_mask, (0, 1), value=1)
    return torch.stack(said, dim=1)


# %% 3 · forgets eos
def answer_limited(model, input_ids, pixel_values, attention_mask, limits):
    cache = model.make_cache(len(input_ids), input_ids.shape[1] + max(limits))
    done, said = torch.zeros(len(input_ids), dtype=torch.bool), []
    while not done.all():
        logits = model(
            input_ids, pixel_values, attention_mask, cache=cache, logits_to_keep=1
        ).logits
        token = logits[:, -1].argmax(-1).masked_fill(done, 0)
        said.append(token)
        done = done | (torch.tensor(limits) <= len(said))
        input_ids, pixel_values = token[:, None], None
        attention_mask = F.pad(attention_mask, (0, 1), value=1)
    return torch.stack(said, dim=1)


# %% 3 · does not hide what ended rows say
def answer_limited(model, input_ids, pixel_values, attention_mask, limits):
    cache = model.make_cache(len(input_ids), input_ids.shape[1] + max(limits))
    done, said = torch.zeros(len(input_ids), dtype=torch.bool), []
    while not done.all():
        logits = model(
            input_ids, pixel_values, attention_mask, cache=cache, logits_to_keep=1
        ).logits
        token = logits[:, -1].argmax(-1)
        said.append(token)
        done = done | (token == EOS) | (torch.tensor(limits) <= len(said))
        input_ids, pixel_values = token[:, None], None
        attention_mask = F.pad(attention_mask, (0, 1), value=1)
    return torch.stack(said, dim=1)


# %% 3 · hides eos too
def answer_limited(model, input_ids, pixel_values, attention_mask, limits):
    cache = model.make_cache(len(input_ids), input_ids.shape[1] + max(limits))
    done, said = torch.zeros(len(input_ids), dtype=torch.bool), []
    while not done.all():
        logits = model(
            input_ids, pixel_values, attention_mask, cache=cache, logits_to_keep=1
        ).logits
        token = logits[:, -1].argmax(-1)
        done = done | (token == EOS) | (torch.tensor(limits) <= len(said))
        token = token.masked_fill(done, 0)
        said.append(token)
        input_ids, pixel_values = token[:, None], None
        attention_mask = F.pad(attention_mask, (0, 1), value=1)
    return torch.stack(said, dim=1)


# %% 3 · forgets the mask
def answer_limited(model, input_ids, pixel_values, attention_mask, limits):
    cache = model.make_cache(len(input_ids), input_ids.shape[1] + max(limits))
    done, said = torch.zeros(len(input_ids), dtype=torch.bool), []
    while not done.all():
        logits = model(input_ids, pixel_values, cache=cache, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1).masked_fill(done, 0)
        said.append(token)
        done = done | (token == EOS) | (torch.tensor(limits) <= len(said))
        input_ids, pixel_values = token[:, None], None
    return torch.stack(said, dim=1)


# %% 3 · no cache
def answer_limited(model, input_ids, pixel_values, attention_mask, limits):
    start, types = input_ids.shape[1], torch.zeros_like(input_ids)
    done = torch.zeros(len(input_ids), dtype=torch.bool)
    while not done.all():
        logits = model(input_ids, pixel_values, attention_mask, token_type_ids=types).logits
        token = logits[:, -1].argmax(-1).masked_fill(done, 0)
        input_ids = torch.cat([input_ids, token[:, None]], 1)
        types = F.pad(types, (0, 1), value=1)
        done = done | (token == EOS) | (torch.tensor(limits) <= input_ids.shape[1] - start)
        attention_mask = F.pad(attention_mask, (0, 1), value=1)
    return input_ids[:, start:]


# %% 3 · row by row
def answer_limited(model, input_ids, pixel_values, attention_mask, limits):
    rows = []
    for row, limit in enumerate(limits):
        one = slice(row, row + 1)
        said = generate(model, input_ids[one], pixel_values[one], attention_mask[one], limit)[0]
        rows.append(F.pad(said, (0, max(limits) - len(said))))
    return torch.stack(rows)


# %% 3 · a list of lists
def answer_limited(model, input_ids, pixel_values, attention_mask, limits):
    said = generate(model, input_ids, pixel_values, attention_mask, max_new_tokens=max(limits))
    return [row[:limit].tolist() for row, limit in zip(said, limits)]


# %% 3 · the mask does not grow
def answer_limited(model, input_ids, pixel_values, attention_mask, limits):
    cache = model.make_cache(len(input_ids), input_ids.shape[1] + max(limits))
    done, said = torch.zeros(len(input_ids), dtype=torch.bool), []
    while not done.all():
        logits = model(
            input_ids, pixel_values, attention_mask, cache=cache, logits_to_keep=1
        ).logits
        token = logits[:, -1].argmax(-1).masked_fill(done, 0)
        said.append(token)
        done = done | (token == EOS) | (torch.tensor(limits) <= len(said))
        input_ids, pixel_values = token[:, None], None
    return torch.stack(said, dim=1)


# %% 3 · nothing
def answer_limited(model, input_ids, pixel_values, attention_mask, limits):
    pass


# %% 3 · steps_plain for all, cut to the limits afterwards
def answer_limited(model, input_ids, pixel_values, attention_mask, limits):
    steps = steps_plain(model, input_ids, pixel_values, attention_mask, max(limits))
    said = torch.stack(list(steps), dim=1)
    late = torch.arange(said.shape[1]) >= torch.tensor(limits)[:, None]
    return said.masked_fill(late, 0)


# %% 3 · hands out the steps one by one
def answer_limited(model, input_ids, pixel_values, attention_mask, limits):
    return steps_plain(model, input_ids, pixel_values, attention_mask, max(limits))
