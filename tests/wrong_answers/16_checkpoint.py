# %% 1 · counts from the beginning of the file's data, header length included
offsets = (8 + 30, 8 + 46)
embedding_bytes = 257216 * 2048 * 2

# %% 1 · gives the length of b instead of its end
offsets = (30, 16)
embedding_bytes = 257216 * 2048 * 2

# %% 1 · takes bfloat16 for four bytes
offsets = (60, 76)
embedding_bytes = 257216 * 2048 * 4

# %% 1 · takes float32 for two bytes
offsets = (30, 38)
embedding_bytes = 257216 * 2048 * 2

# %% 1 · counts numbers, not bytes
offsets = (15, 19)
embedding_bytes = 257216 * 2048

# %% 1 · float32 embedding
offsets = (30, 46)
embedding_bytes = 257216 * 2048 * 4

# %% 1 · the rows of the tokenizer
offsets = (30, 46)
embedding_bytes = 257152 * 2048 * 2

# %% 1 · gigabytes
offsets = (30, 46)
embedding_bytes = 1.05

# %% 1 · one number only
offsets = 30
embedding_bytes = 257216 * 2048 * 2

# %% 1 · forgets the second question
offsets = (30, 46)
embedding_bytes = None


# %% 2 · reads every file of the directory
def load_shards(path):
    model = empty_model(build_config(read_config(path)))
    state = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            state[internal_name(name)] = tensor
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


# %% 2 · forgets to translate the names
def load_shards(path):
    model = empty_model(build_config(read_config(path)))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    state = {}
    for file in set(index["weight_map"].values()):
        state |= load_file(path / file)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


# %% 2 · loads each shard by itself, so that strict has to go
def load_shards(path):
    model = empty_model(build_config(read_config(path)))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        state = {internal_name(n): t for n, t in load_file(path / file).items()}
        model.load_state_dict(state, strict=False, assign=True)
    return model.eval()


# %% 2 · a dictionary for the last shard only
def load_shards(path):
    model = empty_model(build_config(read_config(path)))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    for file in sorted(set(index["weight_map"].values())):
        state = {internal_name(n): t for n, t in load_file(path / file).items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


# %% 2 · copies into a model that has no memory
def load_shards(path):
    model = empty_model(build_config(read_config(path)))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    state = {}
    for file in set(index["weight_map"].values()):
        for name, tensor in load_file(path / file).items():
            state[internal_name(name)] = tensor
    model.load_state_dict(state, strict=True)
    return model.eval()


# %% 2 · never loads what it read
def load_shards(path):
    model = PaliGemma(build_config(read_config(path)))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    state = {}
    for file in set(index["weight_map"].values()):
        for name, tensor in load_file(path / file).items():
            state[internal_name(name)] = tensor
    return model.eval()


# %% 2 · returns the dictionary
def load_shards(path):
    index = json.loads((path / "model.safetensors.index.json").read_text())
    state = {}
    for file in set(index["weight_map"].values()):
        for name, tensor in load_file(path / file).items():
            state[internal_name(name)] = tensor
    return state


# %% 2 · lets the lesson's loader do it
def load_shards(path):
    return load_model(path, dtype=None)


# %% 2 · takes the one file that is not there
def load_shards(path):
    return load_plain(path)


# %% 2 · looks a tensor up as if the index named tensors by file
def load_shards(path):
    model = empty_model(build_config(read_config(path)))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    state = {}
    for file in index["weight_map"]:
        for name, tensor in load_file(path / file).items():
            state[internal_name(name)] = tensor
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


# %% 3 · changes nothing
def damaged(data):
    return bytes(data)


# %% 3 · changes the length of the header
def damaged(data):
    return bytes([data[0] ^ 1]) + data[1:]


# %% 3 · changes a letter of the header
def damaged(data):
    return data[:20] + bytes([data[20] ^ 1]) + data[21:]


# %% 3 · takes the last byte away
def damaged(data):
    return data[:-1]


# %% 3 · adds a byte
def damaged(data):
    return data + b"\x00"


# %% 3 · sets two bytes
def damaged(data):
    return data[:-2] + bytes([data[-2] ^ 1, data[-1] ^ 1])


# %% 3 · changes the tied head, which lies first
def damaged(data):
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    place = 8 + n + header["lm_head.weight"]["data_offsets"][0]
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


# %% 3 · replaces the byte by the same one
def damaged(data):
    return data[:-1] + data[-1:]


# %% 3 · a bytearray
def damaged(data):
    changed = bytearray(data)
    changed[-1] ^= 1
    return changed


# %% 3 · a list of numbers
def damaged(data):
    return [*data[:-1], data[-1] ^ 1]


# %% 3 · forgets to return
def damaged(data):
    data[:-1] + bytes([data[-1] ^ 1])


# %% 2 · takes every file that is called like a shard
def load_shards(path):
    model, state = empty_model(build_config(read_config(path))), {}
    for file in sorted(path.glob("model-*.safetensors"), reverse=True):
        for name, tensor in load_file(file).items():
            state[internal_name(name)] = tensor
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


# %% 3 · a blank of the header
def damaged(data):
    (n,) = struct.unpack("<Q", data[:8])
    return data[: 7 + n] + b"\n" + data[8 + n :]
