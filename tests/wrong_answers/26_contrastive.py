# %% 1 · without a bias
answer = 1000 * math.log(2)
# %% 1 · only the true pair
answer = 10.0
# %% 1 · only the wrong pairs
answer = 0.04
# %% 1 · divided by the cells
answer = 0.01
# %% 1 · the sum over the batch
answer = 10045.0
# %% 1 · forgets that the bias makes the true pair dear
answer = 0.69
# %% 1 · a scale of 10 on top
answer = 20.05
# %% 1 · text
answer = "ten"


# %% 2 · the plain mean
def ensemble(text_features):
    return text_features.mean(dim=0)


# %% 2 · normalises only at the end
def ensemble(text_features):
    return F.normalize(text_features.mean(dim=0), dim=-1)


# %% 2 · normalises only at the start
def ensemble(text_features):
    return F.normalize(text_features, dim=-1).mean(dim=0)


# %% 2 · the mean over the classes
def ensemble(text_features):
    return F.normalize(F.normalize(text_features, dim=-1).mean(dim=1), dim=-1)


# %% 2 · takes the first prompt
def ensemble(text_features):
    return F.normalize(text_features[0], dim=-1)


# %% 2 · normalises over the prompts
def ensemble(text_features):
    return F.normalize(F.normalize(text_features, dim=0).mean(dim=0), dim=-1)


# %% 2 · one vector for each prompt
def ensemble(text_features):
    return F.normalize(text_features, dim=-1)


# %% 3 · only the diagonal is true
def loss_with_doubles(image_features, text_features, same, scale, bias):
    return sigmoid_loss(image_features, text_features, scale, bias)


# %% 3 · labels of 0 and 1
def loss_with_doubles(image_features, text_features, same, scale, bias):
    images, texts = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    labels = (same[:, None] == same[None, :]).float()
    return -(labels * F.logsigmoid(scale * images @ texts.T + bias)).sum() / len(images)


# %% 3 · divides by the cells
def loss_with_doubles(image_features, text_features, same, scale, bias):
    images, texts = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    signs = 2 * (same[:, None] == same[None, :]).float() - 1
    return -F.logsigmoid(signs * (scale * images @ texts.T + bias)).mean()


# %% 3 · the sum
def loss_with_doubles(image_features, text_features, same, scale, bias):
    images, texts = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    signs = 2 * (same[:, None] == same[None, :]).float() - 1
    return -F.logsigmoid(signs * (scale * images @ texts.T + bias)).sum()


# %% 3 · vectors of any length
def loss_with_doubles(image_features, text_features, same, scale, bias):
    signs = 2 * (same[:, None] == same[None, :]).float() - 1
    logits = scale * image_features @ text_features.T + bias
    return -F.logsigmoid(signs * logits).sum() / len(signs)


# %% 3 · log of the sigmoid
def loss_with_doubles(image_features, text_features, same, scale, bias):
    images, texts = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    signs = 2 * (same[:, None] == same[None, :]).float() - 1
    return -torch.sigmoid(signs * (scale * images @ texts.T + bias)).log().sum() / len(images)


# %% 3 · doubles are left out
def loss_with_doubles(image_features, text_features, same, scale, bias):
    images, texts = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    signs = 2 * torch.eye(len(same)) - 1
    keep = (same[:, None] != same[None, :]) | torch.eye(len(same), dtype=torch.bool)
    losses = -F.logsigmoid(signs * (scale * images @ texts.T + bias))
    return (losses * keep).sum() / len(images)


# %% 3 · forgets the bias
def loss_with_doubles(image_features, text_features, same, scale, bias):
    images, texts = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    signs = 2 * (same[:, None] == same[None, :]).float() - 1
    return -F.logsigmoid(signs * (scale * images @ texts.T)).sum() / len(images)


# %% 3 · the sign on the other side
def loss_with_doubles(image_features, text_features, same, scale, bias):
    images, texts = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    signs = 1 - 2 * (same[:, None] == same[None, :]).float()
    return -F.logsigmoid(signs * (scale * images @ texts.T + bias)).sum() / len(images)


# %% 3 · the mean over the pairs that are true
def loss_with_doubles(image_features, text_features, same, scale, bias):
    images, texts = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    true = same[:, None] == same[None, :]
    signs = 2 * true.float() - 1
    return -F.logsigmoid(signs * (scale * images @ texts.T + bias)).sum() / true.sum()


# %% 3 · each double once
def loss_with_doubles(image_features, text_features, same, scale, bias):
    images, texts = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    kept = [list(same).index(number) for number in same.unique()]
    return sigmoid_loss(images[kept], texts[kept], scale, bias)


# %% 2 · the sum of unit vectors divided by their number only
def ensemble(text_features):
    return F.normalize(text_features, dim=-1).sum(dim=0) / len(text_features)


# %% 2 · the median prompt
def ensemble(text_features):
    return F.normalize(text_features.median(dim=0).values, dim=-1)
