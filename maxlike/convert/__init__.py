"""Weights of other libraries in and out: config.json, safetensors and tokenizer files, one small file a family.

A family (`family.Family`) says three things and nothing else:

    network(config)   what config.json describes, as a factory of our classes;
    config(net)       the config.json that describes a network of ours;
    tensors           a table: name in the file <-> parameter of ours, and how the array is laid out there.

To add a family, write them in one file and put the class into `families.FAMILIES`. For a decoder much like Llama:

    class Mine(Family):
        architectures = ("MineForCausalLM",)
        model_type = "mine"
        tensors = (*decoder.EMBEDDINGS, *decoder.ATTENTION, *decoder.GATED_MLP, *decoder.PRE_NORMS)

        def network(self, config):
            mixer = decoder.attention(config, rope=decoder.rope(config), qkv_bias=config.take("qkv_bias", False))
            norm = decoder.rms_norm(config)
            block = functools.partial(Block, mixer=mixer, ffn=decoder.gated_mlp(config), norm=norm)
            return decoder.language_model(config, [block] * config.take("num_hidden_layers"), norm)

        def config(self, net):
            return decoder.config(net) | {"qkv_bias": net.has("stack/0/mixer/query/bias")}

What keeps this honest is not the family but the framework around it. A key of config.json that `network` did not take
refuses the import by name (`config_json`). An export parses the config that it is about to write, builds that network
and compares every setting and every parameter with the model in hand (`structure`), so a `config` that forgets
something refuses the export and names it. A tensor that is missing, left over or of another shape is in a table
(`transfer`). Then the files are read back and the logits compared (`proof`).

A path of `tensors` names layers by depth, `stack/{i}/mixer/query/kernel`, however the experiment groups them into
prefix, pattern and suffix. `{e}` in a tensor's name, with none in the path, stands for the parameter's first dimension:
experts that are one array here and one tensor each there. Where layers of one network hold different things under one
path, `Rule.where` tells them apart. Buffers are imported and exported as parameters are, where a rule names them. What
weights do not tell, such as the losses of a router, is no difference between two networks: `structure.INERT` lists it.
"""
