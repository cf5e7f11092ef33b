// Every form in which a script of another site can reach for the page at T. Each gives what it got hold of.
const [T, BODY, done] = arguments;
const JOIN = T + '/gradio_api/queue/join', host = location.host;
const json = {'Content-Type': 'application/json'}, cookies = {credentials: 'include'};
const silent = {mode: 'no-cors', referrerPolicy: 'no-referrer', ...cookies};
const asked = (path, more = {}) => fetch(T + path, more).then(answer => answer.type === 'opaque' ? 'opaque' : answer.text());
const posted = more => asked('/gradio_api/queue/join', {method: 'POST', body: BODY, ...more});
const within = (promise, seconds = 3) => Promise.race([promise, new Promise(end => setTimeout(end, seconds * 1000, 'late'))]);
const shown = frame => { try { return frame.contentDocument?.body?.innerText ?? 'closed'; } catch { return 'closed'; } };
const put = (name, more) => {
    const made = Object.assign(document.createElement(name), more);
    document.body.append(made);
    return made;
};
const tag = (name, more) => within(new Promise(end => {
    const made = put(name, more);
    made.onload = () => end(name === 'iframe' ? shown(made) : 'loaded');
    made.onerror = () => end('error');
}));
const form = (path, enctype, fields, method = 'post') => {
    const frame = put('iframe', {name: 'f' + Math.random()});
    const made = put('form', {action: T + path, method, enctype, target: frame.name});
    for (const [name, value] of Object.entries(fields)) made.append(Object.assign(document.createElement('input'), {name, value}));
    made.submit();
    return new Promise(end => setTimeout(() => end(shown(frame)), 1000));
};
const forms = {
    read: () => asked('/config'),
    readWithCookies: () => asked('/config', cookies),
    readOpaque: () => asked('/config', silent),
    forwarded: () => asked('/config', {headers: {'X-Forwarded-Host': host}}),
    forwardedWithCookies: () => asked('/config', {headers: {'X-Forwarded-Host': host, 'X-Forwarded-Proto': 'http'}, ...cookies}),
    forwardedStandard: () => asked('/', {headers: {Forwarded: 'host=' + host, 'X-Gradio-Server': location.origin}}),
    forwardedFor: () => asked('/', {headers: {'X-Forwarded-For': '127.0.0.1', 'X-Real-IP': '127.0.0.1'}}),
    anyHeader: () => asked('/config', {headers: {'X-Anything': '1'}}),
    put: () => asked('/config', {method: 'PUT'}),
    join: () => posted({headers: json}),
    joinForwarded: () => posted({headers: {...json, 'X-Forwarded-Host': host}, ...cookies}),
    joinPlain: () => posted(cookies),
    joinOpaque: () => posted({mode: 'no-cors', ...cookies}),
    joinSilent: () => posted({...silent, keepalive: true}),
    joinBeacon: () => navigator.sendBeacon(JOIN, new Blob([BODY], {type: 'text/plain'})) && 'sent',
    joinBeaconJson: () => navigator.sendBeacon(JOIN, new Blob([BODY], {type: 'application/json'})) && 'sent',
    joinForm: () => form('/gradio_api/queue/join', 'text/plain', {[BODY.slice(0, -1) + ', "x": "']: '"}'}),
    cancel: () => asked('/gradio_api/cancel', {method: 'POST', headers: json, body: '{}'}),
    login: () => form('/login', 'application/x-www-form-urlencoded', {username: 'me', password: 'secret'}),
    upload: () => form('/gradio_api/upload', 'multipart/form-data', {files: 'a'}),
    deepLink: () => form('/', '', {deep_link: 'a'}, 'get'),
    logoutImage: () => tag('img', {src: T + '/logout'}),
    logoutSilentImage: () => tag('img', {src: T + '/logout', referrerPolicy: 'no-referrer'}),
    logoutFetch: () => asked('/logout', silent),
    script: () => tag('script', {src: T + '/config'}),
    style: () => tag('link', {rel: 'stylesheet', href: T + '/theme.css'}),
    image: () => tag('img', {src: T + '/favicon.ico'}),
    frame: () => tag('iframe', {src: T + '/'}),
    embed: () => tag('embed', {src: T + '/'}).then(() => 'closed'),
    object: () => tag('object', {data: T + '/'}).then(() => 'closed'),
    events: () => within(new Promise(end => {
        const source = new EventSource(T + '/gradio_api/queue/data?session_hash=evil', {withCredentials: true});
        source.onopen = () => end('open');
        source.onerror = () => { source.close(); end('error'); };
    })),
    socket: () => within(new Promise(end => {
        const socket = new WebSocket(T.replace('http', 'ws') + '/gradio_api/queue/join');
        socket.onopen = () => end('open');
        socket.onerror = () => end('error');
    })),
    sandboxed: () => within(new Promise(end => {  // its origin is `null`
        onmessage = message => end(message.data);
        const script = `<script>
            const join = {method: 'POST', mode: 'no-cors', body: ${JSON.stringify(BODY)}};
            const read = fetch('${T}/config', {headers: {'X-Forwarded-Host': 'null'}}).then(answer => answer.text());
            Promise.allSettled([read, fetch('${JOIN}', join)]).then(all => parent.postMessage(all[0].value ?? 'error', '*'));
        <\/script>`;
        put('iframe', {sandbox: 'allow-scripts', srcdoc: script});
    })),
    worker: () => within(new Promise(end => {
        const work = `fetch('${T}/config', {headers: {'X-Forwarded-Host': '${host}'}})
            .then(answer => answer.text()).then(postMessage, () => postMessage('error'))`;
        new Worker(URL.createObjectURL(new Blob([work]))).onmessage = message => end(message.data);
    })),
};
(async () => {
    const got = {};
    for (const [name, reach] of Object.entries(forms)) {
        try { got[name] = String(await reach()); } catch { got[name] = 'error'; }
    }
    setTimeout(done, 500, got);
})();
