import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
d=sys.argv[1]
tok=AutoTokenizer.from_pretrained(d); m=AutoModelForCausalLM.from_pretrained(d,dtype=torch.bfloat16).eval()
W={"type":"function","function":{"name":"get_weather","description":"Get the current weather for a city","parameters":{"type":"object","properties":{"city":{"type":"string","description":"City name"}},"required":["city"]}}}
convs=[
 (["Hi!","My name is Ana and I live in Lima.","What is minisgl?","What is 347 + 285?","What's my name?","Where do I live?","Thanks, bye!"],None),
 (["hey, who are you","what can you do for me?","tell me a joke","another one","tell me a story about a dragon","can you repeat that?"],None),
 (["how do i start the server on port 8000?","whats a kv cache","why is it paged","and what is continuous batching good for?","Explain radix cache to me like I'm five"],None),
 (["Make a JSON object with name, age and city: Ana is 31 and lives in Lima.","Give me a JSON with the name and the job for this: Bob is a plumber from Rome."],None),
 (["What is the weather in Paris?"],[W]),(["Hello there","How's the weather in Tokyo today?"],[W]),(["Who are you?","what is 12+30"],[W]),
 (["What is the capital of France?","Who was Napoleon?","How do I bake bread?","what's the best LLM?"],None),
 (["你好","我叫小明，我住在上海。","什么是KV缓存？","我叫什么名字？","15加27等于多少？","讲个故事吧"],None),
 (["Count from 3 to 9","Sort 5, 2, 9, 1","sort these words: pear, apple, fig","reverse 1, 2, 3","What is 999+1?","what is 1000 - 1","12 + 7 + 5"],None),
 (["I have a dog called Rex and a cat called Tom.","My sister is called Zibora","what is my dog's name?","what is the cat's name?","what's my sister's name?","what do you know about me?"],None),
 (["Write a haiku about caching","do you like pizza?","I'm Kevin by the way","what did i say my name was","where am i from"],None),
]
for users,tools in convs:
    msgs=[]
    print('=====', [t['function']['name'] for t in tools] if tools else '')
    for u in users:
        msgs.append({"role":"user","content":u})
        p=tok.apply_chat_template(msgs,tools=tools,add_generation_prompt=True,tokenize=False)
        i=tok(p,return_tensors="pt")
        o=m.generate(input_ids=i.input_ids,attention_mask=i.attention_mask,do_sample=False,max_new_tokens=120,temperature=None,top_p=None,top_k=None)
        r=tok.decode(o[0,i.input_ids.size(1):],skip_special_tokens=True)
        print('U:',u); print('A:',r); msgs.append({"role":"assistant","content":r})
