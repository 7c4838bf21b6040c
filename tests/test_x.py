from pathlib import Path
import pytest, shutil, json, os
def show(o):
    with open('/tmp/show.txt','a') as f: print('RC',o.code, '|', o.out[-500:], '| ERR', o.err, file=f)
def test_a(workplace, heretic):
    Path('empty').mkdir(); Path('adapter').mkdir(); Path('adapter/adapter_config.json').write_text('{}')
    for m in ['empty','adapter','good.txt','./nom','/no/such','~nobody/x','own/er/x','no-such-model','owner/no-such', 'ümlaut/x', '']:
        open('/tmp/show.txt','a').write(f'===== {m}\n'); show(heretic('--model',m))
    Path('broken').mkdir(); Path('broken/config.json').write_text('{"model_ty'); show(heretic('--model','broken'))
    Path('broken/config.json').write_text('{}'); show(heretic('--model','broken'))
    Path('broken/config.json').write_text('{"model_type":"nonsense"}'); show(heretic('--model','broken'))
    Path('broken/config.json').write_text('{"model_type":"bert"}'); show(heretic('--model','broken'))
    shutil.copytree('m','now'); os.remove('now/model.safetensors'); show(heretic('--model','now'))
    shutil.copytree('m','cut'); c=Path('cut/model.safetensors').read_bytes(); Path('cut/model.safetensors').write_bytes(c[:5000]); show(heretic('--model','cut'))
    shutil.copytree('m','notok'); os.remove('notok/tokenizer.json'); os.remove('notok/tokenizer_config.json'); show(heretic('--model','notok'))
    shutil.copytree('m','remote'); c=json.loads(Path('remote/config.json').read_text()); c['auto_map']={'AutoConfig':'x.Y','AutoModelForCausalLM':'x.Z'}; c['model_type']='mine'; Path('remote/config.json').write_text(json.dumps(c)); show(heretic('--model','remote'))
    assert 0
def test_b(workplace, heretic):
    for a in [['--bad-prompts.dataset','good.txt'],['--refusal-markers','["zzz"]'],['--max-response-length','300'],['--model-action','save'],['--trial-index','0'],['--model-action','chat'],['--model-action','upload'],['--save-directory','m','--model-action','save','--trial-index','0','--export-strategy','merge'],['--model-action','none'],['--study-checkpoint-dir','good.txt/x'],['--device-map','nonsense'],['--model-action','save','--trial-index','9','--export-strategy','merge','--save-directory','out','--study-checkpoint-dir','c2'],['--quantization','bnb_4bit'],['--evaluate-model','m'],['--evaluate-model','nix']]:
        open('/tmp/show.txt','a').write(f'===== {a}\n'); show(heretic(*a))
    Path('bad.txt').write_text('how '*400); show(heretic('--study-checkpoint-dir','c3')); show(heretic('--study-checkpoint-dir','c3','--bad-evaluation-prompts.dataset','good.txt'))
    assert 0
