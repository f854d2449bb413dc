import { useEffect, useLayoutEffect, useRef, useState } from "react"
import { path, versions } from "./conversations"
import { Copy, Markdown } from "./Markdown"
import { text } from "./text"
import { Tokens } from "./Tokens"
import type { Node } from "./types"
import type { Chat } from "./useChat"

interface Props { chat: Chat, openSettings: () => void }

export function Messages({ chat, openSettings }: Props) {
  const nodes = path(chat.talk)
  const { problem, engineState } = chat
  const here = problem && (!problem.talk || problem.talk === chat.talk.id)
  const list = useRef<HTMLDivElement>(null)
  const follow = useRef(true) // whether the reader is at the end
  const last = nodes.at(-1)

  useLayoutEffect(() => { follow.current = true }, [chat.talk.id, nodes.length])
  useLayoutEffect(() => {
    if (follow.current) list.current!.scrollTop = list.current!.scrollHeight
  }, [chat.talk.id, nodes.length, last?.content, problem])

  return (
    <div className="messages" ref={list} role="region" aria-label={text.messages} tabIndex={0} onScroll={() => {
      const { scrollTop, scrollHeight, clientHeight } = list.current!
      follow.current = scrollHeight - scrollTop - clientHeight < 40
    }}>
      <SystemText key={chat.talk.id} chat={chat} />
      {!nodes.length && <Welcome chat={chat} />}
      {nodes.map(node => <Message key={node.id} chat={chat} node={node} last={node === last} />)}
      {engineState.state === "failed" && <Trouble chat={chat} openSettings={openSettings} code={engineState.error.code}
        detail={engineState.error.detail} retry={chat.restart} />}
      {here && <Trouble chat={chat} openSettings={openSettings} code={problem.error.code} detail={problem.error.detail}
        retry={problem.node ? () => chat.again(chat.talk.nodes[problem.node!]) : undefined} />}
    </div>
  )
}

function Welcome({ chat }: { chat: Chat }) {
  const engine = chat.engineState
  return (
    <section className="welcome">
      <h2>{text.welcome}</h2>
      {engine.state === "ready" && <p>{engine.info.place === "server" ? text.welcomeServer(engine.info.name)
        : text.welcomeBrowser(engine.info.name)}</p>}
      <p className="help">{text.small}</p>
      <h3>{text.suggested}</h3>
      <ul>
        {text.suggestions.map(suggestion => (
          <li key={suggestion}>
            <button disabled={engine.state !== "ready" || !!chat.running} onClick={() => chat.say(suggestion)}>
              {suggestion}</button>
          </li>))}
      </ul>
    </section>
  )
}

function SystemText({ chat: { talk, update } }: { chat: Chat }) {
  return (
    <details className="system" open={!!talk.system || undefined}>
      <summary>{text.system}</summary>
      <textarea rows={2} aria-label={text.system} aria-describedby="system-help" value={talk.system}
        onChange={event => update(talk, { system: event.target.value })} />
      <p id="system-help" className="help">{text.systemHelp}</p>
    </details>
  )
}

/** What went wrong, in words, and the ways out. */
function Trouble({ chat, code, detail, retry, openSettings }:
    { chat: Chat, code: string, detail: string, retry?: () => void, openSettings: () => void }) {
  const say = text.errors[code] ?? text.errors.unknown
  const elsewhere = chat.settings.engine !== "browser" && ["server-gone", "no-api", "key", "queue", "busy"].includes(code)
  const settings = ["server-gone", "no-api", "bad-address", "key", "no-model", "memory", "no-worker"].includes(code)
  const own = retry === chat.restart // a failed start goes when it works
  return (
    <div className="trouble" role="alert">
      <p>{say(detail)}</p>
      <div className="row">
        {retry && code !== "too-long" && <button onClick={retry} disabled={!!chat.running}>{text.retry}</button>}
        {settings && <button onClick={openSettings}>{text.settings}</button>}
        {elsewhere && <button onClick={() => chat.setSettings({ ...chat.settings, engine: "browser" })}>
          {text.useBrowser}</button>}
        {!own && <button onClick={() => chat.setProblem(null)}>{text.dismiss}</button>}
      </div>
    </div>
  )
}

function Message({ chat, node, last }: { chat: Chat, node: Node, last: boolean }) {
  const [editing, setEditing] = useState(false)
  const [tokens, setTokens] = useState(false)
  const edit = useRef<HTMLButtonElement>(null)
  const mine = node.role === "user"
  const running = chat.running?.node === node.id
  const asked = chat.talk.nodes[node.parent]
  const stopEditing = () => { setEditing(false); setTimeout(() => edit.current?.focus()) }

  return (
    <article className={node.role} aria-label={mine ? text.you : text.model} aria-busy={running}>
      {editing ? <Editor node={node} cancel={stopEditing} save={content => {
        setEditing(false)
        chat.editMessage(node, content)
      }} />
        : mine ? <p className="said">{node.content}</p>
          : tokens ? <Tokens chat={chat} node={node} />
            : <div className="said"><Markdown content={node.content || (running ? "…" : text.emptyAnswer)} /></div>}
      {!editing && !running && (
        <div className="actions">
          <Versions chat={chat} node={node} />
          <Copy what={() => node.content} />
          {mine && <button ref={edit} disabled={!!chat.running} onClick={() => setEditing(true)}>{text.edit}</button>}
          {!mine && asked && last && <button disabled={!!chat.running} onClick={() => chat.again(asked)}>
            {text.again}</button>}
          {mine && last && <button disabled={!!chat.running || chat.engineState.state !== "ready"}
            onClick={() => chat.again(node)}>{text.again}</button>}
          {!!node.tokens?.length && <button aria-pressed={tokens} onClick={() => setTokens(!tokens)}>
            {tokens ? text.tokensHide : text.tokens}</button>}
          {node.finish === "length" && <span className="help">{text.cutByLength}</span>}
          {!mine && node.finish !== "length" && node.finish !== "stop" && node.tokens && <span className="help">
            {text.stopped}</span>}
          {!!node.forgotten && <span className="help">{text.forgotten(node.forgotten)}</span>}
        </div>)}
    </article>
  )
}

/** Flip through the versions of a message. */
function Versions({ chat, node }: { chat: Chat, node: Node }) {
  const all = versions(chat.talk, node)
  const at = all.indexOf(node)
  if (all.length < 2) return null
  return (
    <span className="versions">
      <button aria-label={text.earlier} disabled={at === 0 || !!chat.running} onClick={() => chat.show(all[at - 1])}>‹</button>
      {text.version(at + 1, all.length)}
      <button aria-label={text.later} disabled={at === all.length - 1 || !!chat.running}
        onClick={() => chat.show(all[at + 1])}>›</button>
    </span>
  )
}

function Editor({ node, save, cancel }: { node: Node, save: (content: string) => void, cancel: () => void }) {
  const [content, setContent] = useState(node.content)
  const area = useRef<HTMLTextAreaElement>(null)
  useEffect(() => {
    area.current!.focus()
    area.current!.setSelectionRange(content.length, content.length)
  }, [])
  return (
    <form className="editor" onSubmit={event => { event.preventDefault(); if (content.trim()) save(content) }}
      onKeyDown={event => {
        if (event.key === "Escape") { event.stopPropagation(); cancel() }
        if (event.key === "Enter" && !event.shiftKey && !event.nativeEvent.isComposing) {
          if (event.target !== area.current) return
          event.preventDefault()
          if (content.trim()) save(content)
        }
      }}>
      <textarea ref={area} aria-label={text.editLabel} rows={Math.min(12, content.split("\n").length + 1)}
        value={content} onChange={event => setContent(event.target.value)} />
      <p className="help">{text.editHint}</p>
      <div className="row end">
        <button type="button" onClick={cancel}>{text.cancel}</button>
        <button className="primary" disabled={!content.trim()}>{text.saveEdit}</button>
      </div>
    </form>
  )
}
